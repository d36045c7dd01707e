"""The registry in PostgreSQL: who wears which device, where points go, what is committed. Only here is psycopg known."""
