"""The measures of `reroll evaluate`, one file each."""
