"""Topics that the stream writes itself: what each kind computes, and how it is run exactly once."""
