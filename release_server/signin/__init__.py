"""Signing in to the page with an OpenID provider; loads none of its libraries before somebody does."""
