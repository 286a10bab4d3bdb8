"""Other frameworks' training steps, timed in turn with ours."""
