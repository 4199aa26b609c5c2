"""Speech encoders and the autoencoder over whole clips, in bounded memory: shared by preparation and inference."""
