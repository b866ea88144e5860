"""The server: OpenAI's HTTP and Realtime protocols over the engine."""
