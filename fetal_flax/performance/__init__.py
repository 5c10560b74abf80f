"""What a machine does with a network, and how near to the machine's limits."""
