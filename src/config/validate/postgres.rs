//! `[ledger] postgres`: where a copy of the rows goes.

use super::super::raw::RawPostgres;
use super::super::{PostgresServer, PostgresSettings, defaults};
use super::{At, Checker};

impl Checker<'_> {
    pub(super) fn postgres(&mut self, raw: &At<RawPostgres>) -> Option<PostgresSettings> {
        let table = &raw.value;
        let server = self.postgres_server(raw);
        let ca_file = table.ca_file.as_ref().map(|written| {
            let path = self.surroundings.folder.join(&written.value);
            self.file(&path, &written.place);
            path
        });
        let settings = PostgresSettings {
            ca_file: ca_file.or_else(|| server.as_ref()?.ca_file.clone()),
            instance: table.instance.as_ref().map(|name| name.value.clone()),
            batch_rows: self.size(
                table.batch_rows.as_ref(),
                defaults::POSTGRES_BATCH_ROWS,
                1..=defaults::MOST_POSTGRES_BATCH_ROWS,
                "write how many rows one transaction may hold",
            ),
            connect_timeout: self
                .time_above_zero(table.connect_timeout.as_ref(), defaults::POSTGRES_CONNECT_TIMEOUT),
            statement_timeout: self
                .time_above_zero(table.statement_timeout.as_ref(), defaults::POSTGRES_STATEMENT_TIMEOUT),
            server: server?,
        };
        Some(settings)
    }

    fn postgres_server(&mut self, raw: &At<RawPostgres>) -> Option<PostgresServer> {
        let Some(url) = &raw.value.url else {
            self.findings.missing(&raw.place, "url", "write `url = { env = \"DATABASE_URL\" }`");
            return None;
        };
        let secret = self.secret(url)?;
        secret
            .expose()
            .parse()
            .map_err(|error: super::super::postgres::ParseServerError| {
                self.findings.problem(&url.place, format!("what it refers to {}", error.what), error.remedy);
            })
            .ok()
    }
}
