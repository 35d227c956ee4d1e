"""What a server decides in a round: whom it asks, and how far it goes along the mean of what they send."""
