"""The commands of operators, one module a noun; each command parses, calls the API, and prints."""
