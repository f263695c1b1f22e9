"""`roundhouse tune`: search the settings of a deployment on the user's own load, and say what each of them brought."""
