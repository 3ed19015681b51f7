-- One migration at a time per database; no name below may mean something of the caller's.
set local search_path = pg_catalog, pg_temp;
set local client_min_messages = warning;
set local statement_timeout = 0;
select pg_catalog.pg_advisory_xact_lock(7453013481208901); -- any constant, as long as it stays the same
