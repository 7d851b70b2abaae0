"""What others are told of rollouts, releases and agents, by signed requests of the jobs process."""
