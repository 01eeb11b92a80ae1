"""The passes, one file each: every module of this folder is found by `reroll.rewrite.passes.registry`."""
