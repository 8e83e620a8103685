"""CogVideoX: text to video."""
