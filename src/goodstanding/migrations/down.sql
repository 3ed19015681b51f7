-- Remove every trace: the schema with all that is in it, and the role unless something else uses it.

-- The triggers on the host's tables go with it; for them no writer may wait longer than this.
set local lock_timeout = '400ms';
drop schema if exists reputation cascade;
set local lock_timeout = 0;

-- A role belongs to the whole cluster, so it goes only with its last use; its memberships go with it.
do $$
begin
    if pg_catalog.to_regrole('goodstanding_service') is not null then
        begin
            drop role goodstanding_service;
        exception
            when dependent_objects_still_exist then
                raise warning 'the role goodstanding_service is kept: something else still uses it';
            when insufficient_privilege then
                raise warning 'the role goodstanding_service is kept: this login may not drop it';
            when undefined_object then
                null; -- another database's last use ended in the same moment
        end;
    end if;
end
$$;
