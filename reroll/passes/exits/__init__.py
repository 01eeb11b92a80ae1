"""What `insert_exits` is made of: scores, classifiers, heads of exits, and absent tokens."""
