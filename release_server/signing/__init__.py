"""The signer: the one process that opens the online keys, what it is ready to sign, and how it is asked."""
