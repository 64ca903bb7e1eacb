"""What training makes smaller: a loss of the network's outputs, written once for every step."""
