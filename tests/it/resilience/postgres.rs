//! Postgres goes away and comes back, and the proxy is killed while it ships: every row arrives, and arrives once.

use std::collections::HashSet;
use std::time::Duration;

use breakeven::config::PostgresSettings;
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::ledger::{postgres, query};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::kill::call_on;
use super::{LEDGER, Served, metric};
use crate::support::postgres::Postgres;
use crate::support::{Http, needs};

const MODEL: &str = "gpt-4o-mini";
const CLIENTS: usize = 16;
/// Rows of a transaction: few, so that a kill finds the shipper at work.
const BATCH_ROWS: u64 = 5;
/// Rows that wait when Postgres comes back.
const BACKLOG: u64 = 600;
const KILLS: u64 = 3;

async fn until(what: &str, served: &Served, name: &str, is_so: impl Fn(u64) -> bool) {
    let so = async {
        let mut look = tokio::time::interval(Duration::from_millis(10));
        while !is_so(metric(&served.admin_url(), name).await) {
            look.tick().await;
        }
    };
    let so = tokio::time::timeout(Duration::from_mins(1), so).await;
    so.unwrap_or_else(|_| panic!("{what}: {}", served.log()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_row_is_lost_or_doubled_when_postgres_goes_away_and_the_proxy_is_killed_while_it_ships() {
    needs!(Postgres);
    let mut database = Postgres::start().await;
    let secrets = tempfile::tempdir().unwrap();
    let url = secrets.path().join("url");
    std::fs::write(&url, database.url("postgres")).unwrap();
    let settings = Settings { time_per_output_token: Duration::from_millis(1), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let config = format!(
        "postgres = {{ url = {{ file = \"{}\" }}, batch_rows = {BATCH_ROWS}, instance = \"one\" }}\n\
         [backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        url.display(),
        api.url()
    );
    let mut served = Served::start("", &config, &[]).await;
    let (ended, mut ends) = mpsc::unbounded_channel();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(call_on(served.url(), client % 2 == 0, ended.clone()));
    }
    drop(ended);

    until("rows are shipped", &served, "breakeven_ledger_shipped_records_total", |rows| rows > 0).await;
    database.crash();
    until("it is noticed", &served, "breakeven_ledger_ship_failures_total", |failures| failures > 0).await;
    until("rows wait", &served, "breakeven_ledger_unshipped_records", |rows| rows >= BACKLOG).await;
    let reply = Http::new(&served.admin_url()).get("/readyz").await;
    assert_eq!(reply.status, 200, "Postgres is no part of being ready: {}", reply.text());
    let mut seen = Vec::new();
    while let Ok(id) = ends.try_recv() {
        seen.push(id);
    }
    assert!(!seen.is_empty() && clients.try_join_next().is_none(), "calls go on as if nothing were");

    database.start_again().await;
    for kill in 1..=KILLS {
        let shipped = "breakeven_ledger_shipped_records_total";
        until("it ships again", &served, shipped, |rows| rows >= kill * BATCH_ROWS).await;
        served.child.kill().await.unwrap();
        served.restart().await;
    }
    while let Some(id) = ends.recv().await {
        seen.push(id);
    }
    let shipped_at = "breakeven_ledger_ship_timestamp_seconds";
    until("it ships again", &served, "breakeven_ledger_shipped_records_total", |rows| rows > 0).await;
    until("all of it", &served, "breakeven_ledger_unshipped_records", |rows| rows == 0).await;
    let text = Http::new(&served.admin_url()).get("/metrics").await;
    assert!(text.text().contains(shipped_at), "{}", text.text());
    served.signal("-TERM");
    served.child.wait().await.unwrap();

    let path = served.folder.path().join(LEDGER);
    let own: HashSet<Uuid> = query::recent(&path, usize::MAX).unwrap().iter().map(|row| row.id).collect();
    let rows = database.rows("postgres", "SELECT id FROM breakeven.calls").await;
    let there: HashSet<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(there.len(), rows.len(), "no row is there twice");
    assert_eq!(there, own);
    let lost = seen.iter().filter(|id| !there.contains(&id.parse::<Uuid>().unwrap())).count();
    assert_eq!(lost, 0, "of {} calls seen to their end", seen.len());
    let by = ["outcome".parse().unwrap(), "model".parse().unwrap()];
    let settings = PostgresSettings::of(database.url("postgres").parse().unwrap());
    let one = postgres::totals(&settings, None, None, &by).await.unwrap();
    assert_eq!(one, query::totals(&path, None, None, &by).unwrap());
    eprintln!(
        "{} calls seen to their end, {} rows, {KILLS} kills, one crash of Postgres",
        seen.len(),
        rows.len()
    );
}
