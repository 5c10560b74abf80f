"""Loss, optimizer, sharded step, loop."""
