"""The defences (GCM, random resize-and-pad) and the classifier that carries them."""
