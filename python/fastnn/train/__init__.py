"""The main job: train the MNIST CNN with torch.nn and with fastnn side by side and compare them."""
