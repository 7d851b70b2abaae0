"""What an agent is when nothing is updating."""
