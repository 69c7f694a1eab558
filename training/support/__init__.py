"""What knows nothing of training: errors, the parser of commands, files, tables, the machine."""
