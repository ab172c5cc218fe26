"""What a recipe can add to FedAvg, one part a file. `photon.parts.base` says what a part may change."""
