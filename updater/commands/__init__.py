"""The commands of `agent` that people type; one room a noun, loaded when it is called."""
