"""The registry in PostgreSQL: who wears which device, where points go, what is committed. Only it knows psycopg."""
