"""Every router x dispatch path x mesh x dtype x remat against a float64 oracle on the CPU."""
