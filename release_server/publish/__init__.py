"""What runs on the machine of a release manager: build, sign, push, and the operator commands."""
