"""What is wrong with the running statistics of a network."""
