"""diffusers folders to parameters of our models: read directly, or converted to Orbax once."""

from .convert import convert_checkpoint as convert_checkpoint
from .diffusers import DiffusersCheckpoint as DiffusersCheckpoint
