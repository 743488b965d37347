//! The admin side against its network: who has no token.

use std::net::SocketAddr;

use breakeven::demo::{FakeBackend, Personality, Settings};
use http::{Method, StatusCode};

use super::Served;
use crate::support::{Http, free_address};

fn config_of(api: &FakeBackend) -> String {
    format!("[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n", api.url())
}

async fn api() -> FakeBackend {
    FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap()
}

#[tokio::test]
async fn a_reload_that_takes_the_token_away_is_refused_while_the_network_can_reach_the_admin_side() {
    let api = api().await;
    let open = SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let token = "admin_token = { env = \"ADMIN_TOKEN\" }";
    let folder = tempfile::tempdir().unwrap();
    let served =
        Served::start_with_admin_at(open, folder, token, &config_of(&api), &[("ADMIN_TOKEN", "open-sesame")])
            .await;
    let path = served.folder.path().join("breakeven.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    // As a file it is good: the admin side is on the loopback there.
    let shut = text.replace(&open.to_string(), &format!("127.0.0.1:{}", open.port())).replace(token, "");
    std::fs::write(&path, shut).unwrap();

    let admin = Http::new(&served.admin_url());
    let reload = admin.request(Method::POST, "/api/reload").header("authorization", "Bearer open-sesame");
    let reload = admin.send(reload, bytes::Bytes::new()).await;
    assert_eq!(reload.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", reload.text());
    assert!(reload.text().contains("server.admin_token"), "{}", reload.text());
    assert_eq!(admin.get("/metrics").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(admin.get("/livez").await.status, StatusCode::OK);

    // On the loopback nobody else is there.
    let served = Served::start(token, &config_of(&api), &[("ADMIN_TOKEN", "open-sesame")]).await;
    let path = served.folder.path().join("breakeven.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(token, "")).unwrap();
    served.signal("-HUP");
    served.says("the configuration was reloaded").await;
    assert_eq!(Http::new(&served.admin_url()).get("/metrics").await.status, StatusCode::OK);
}
