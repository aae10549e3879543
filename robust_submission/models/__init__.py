"""The defences (GCM, TRN, random resize-and-pad) and the classifier that carries them."""
