"""What a recipe needs on devices that one need not have, and the benchmark."""
