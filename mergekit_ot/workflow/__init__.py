"""The jobs behind the commands: each takes plain values, does one thing and returns a result to print."""
