//! The fuzzer's corpus through what the fuzzer calls (`tests/fuzz`).

use std::path::Path;

#[path = "../fuzz/targets.rs"]
#[expect(unreachable_pub, reason = "it is a crate of its own where the fuzzer uses it")]
mod targets;

/// What holds for any bytes, and the folder of its corpus.
type Target = (&'static str, fn(&[u8]));

#[test]
fn every_file_of_the_corpus_holds() {
    let targets: [Target; 5] = [
        ("sse", targets::sse),
        ("request", targets::request),
        ("answer", targets::answer),
        ("config", targets::config),
        ("money", targets::money),
    ];
    for (name, target) in targets {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
        let mut files = 0;
        for file in std::fs::read_dir(&corpus).unwrap() {
            let path = file.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(&path).unwrap());
            files += 1;
        }
        assert!(files > 2, "{} holds {files} files", corpus.display());
    }
}
