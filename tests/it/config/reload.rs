//! What becomes of a configuration that changes while it is in force.

use std::fs;

use breakeven::config::Tls;
use breakeven::config::reload::Watcher;

use super::{SMALL, good, quoted, small_with};

const MANUAL: &str = include_str!("../../../docs/configuration.md");

#[test]
fn the_manual_names_the_keys_that_need_a_restart() {
    let old = good(SMALL);
    let mut new = good(&format!(
        "[server]\nlisten = \"127.0.0.1:5000\"\nadmin_listen = \"127.0.0.1:5001\"\nworkers = 1000\n\
         [ledger]\npath = \"other.db\"\nfsync = \"always\"\n\
         [metrics]\nmax_series = 100\n[log]\nformat = \"json\"\n{SMALL}"
    ));
    new.server.tls = Some(Tls { certificate: "c".into(), private_key: "k".into() });
    let needed = old.restart_needed(&new);
    assert_eq!(needed.len(), 8, "{needed:?}");
    for key in needed {
        assert!(MANUAL.contains(&format!("`{key}`")), "{key}");
    }
}

#[test]
fn a_changed_file_is_noticed_by_content_and_a_bad_one_is_reported_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("breakeven.toml");
    fs::write(&path, SMALL).unwrap();
    let (mut watcher, loaded) = Watcher::start(&path);
    let old = loaded.unwrap();
    assert!(watcher.poll().is_none());
    fs::write(&path, SMALL).unwrap();
    assert!(watcher.poll().is_none(), "written anew, and the same");

    fs::write(&path, format!("[server]\nlisten = \"127.0.0.1:5000\"\n{SMALL}")).unwrap();
    let new = watcher.poll().unwrap().unwrap();
    assert_eq!(old.restart_needed(&new), ["server.listen"]);
    assert_ne!(old.digest, new.digest);

    fs::write(&path, "nonsense").unwrap();
    assert!(watcher.poll().unwrap().is_err());
    assert!(watcher.poll().is_none());
    fs::remove_file(&path).unwrap();
    assert!(watcher.poll().unwrap().is_err());
    fs::write(&path, SMALL).unwrap();
    assert_eq!(watcher.poll().unwrap().unwrap().digest, old.digest);
}

#[cfg(unix)]
#[test]
fn a_config_map_swap_and_a_rotated_secret_are_changes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = small_with(
        "kind = \"api\"",
        &format!("kind = \"api\"\napi_key = {{ file = {} }}", quoted(&at("key"))),
    );
    for (version, text) in [("v1", text.clone()), ("v2", text.replace("2.50", "3.50"))] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("breakeven.toml"), text).unwrap();
    }
    fs::write(at("key"), "first").unwrap();
    std::os::unix::fs::symlink("v1", at("data")).unwrap();
    let (mut watcher, loaded) = Watcher::start(&at("data").join("breakeven.toml"));
    assert_eq!(loaded.unwrap().backends[1].hourly(), "2.5".parse().unwrap());

    std::os::unix::fs::symlink("v2", at("next")).unwrap();
    fs::rename(at("next"), at("data")).unwrap();
    assert_eq!(watcher.poll().unwrap().unwrap().backends[1].hourly(), "3.5".parse().unwrap());

    fs::write(at("key"), "second").unwrap();
    let rotated = watcher.poll().unwrap().unwrap();
    assert_eq!(rotated.backends[0].api_key.as_ref().unwrap().expose(), "second");
    assert!(watcher.poll().is_none());
}
