"""Two replicas of the server on one PostgreSQL, killed at any moment while a fleet is rolled out."""
