"""The demo: a real server, real agents, one good release and one bad one."""
