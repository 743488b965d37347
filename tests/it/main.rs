mod upstream_pool;
