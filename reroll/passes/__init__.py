"""The passes, one file each: `reroll.rewrite.passes.registry` finds every module of this folder."""
