"""Times the training steps of other frameworks in turn with ours."""
