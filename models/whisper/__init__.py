"""Speech recognition with small Whisper networks."""
