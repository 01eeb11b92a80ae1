"""What a lowered module calls: attention, recurrences, loops and exits."""
