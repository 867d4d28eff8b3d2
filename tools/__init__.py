"""What keeps the project in order: its environments, its lock, its lanes. No part of the packages."""
