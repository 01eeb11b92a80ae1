"""The passes, one file each: `reroll.rewrite.pipeline.registry` finds every module here."""
