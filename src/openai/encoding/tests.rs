//! Against what the reference compressors made (`tests/data/encodings/make.py`).

use std::path::Path;

use super::*;

const CODINGS: [(Coding, &str); 4] =
    [(Coding::Gzip, "gz"), (Coding::Deflate, "deflate"), (Coding::Brotli, "br"), (Coding::Zstd, "zst")];

fn data(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/encodings").join(name)).unwrap()
}

/// Counts what it is given, and keeps nothing.
#[derive(Default)]
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn every_coding_decodes_to_the_same_however_it_is_cut() {
    for name in ["answer.json", "stream.sse"] {
        let plain = data(name);
        for (coding, suffix) in CODINGS {
            let coded = data(&format!("{name}.{suffix}"));
            for step in [1, 2, 3, 7, 50, 1000, coded.len()] {
                let mut decoder = Decoder::new(coding, Vec::new());
                coded.chunks(step).for_each(|piece| decoder.push(piece).unwrap());
                decoder.finish().unwrap();
                assert!(*decoder.sink() == plain, "{name} {coding:?} in steps of {step}");
            }
            assert_eq!(decode(coding, &coded, plain.len()), Ok(plain.clone()));
            assert_eq!(decode(coding, &coded, plain.len() - 1), Err(DecodeError::TooLong));
        }
    }
}

#[test]
fn what_the_sender_has_flushed_is_there_at_once() {
    let plain = data("stream.sse");
    for (coding, suffix) in CODINGS {
        let coded = data(&format!("stream.sse.{suffix}"));
        let mut decoder = Decoder::new(coding, Vec::new());
        let half = coded.len() / 2;
        decoder.push(&coded[..half]).unwrap();
        let shown = decoder.sink().len();
        assert!(plain.starts_with(decoder.sink_ref()), "{coding:?}");
        assert_eq!(shown > plain.len() / 5, coding.is_prompt(), "{coding:?} {shown} of {}", plain.len());
    }
}

#[test]
fn what_is_incomplete_or_damaged_is_an_error() {
    for (coding, suffix) in CODINGS {
        let coded = data(&format!("answer.json.{suffix}"));
        assert_eq!(
            decode(coding, &coded[..coded.len() - 1], 1 << 20),
            Err(DecodeError::Malformed),
            "{coding:?}"
        );
        assert_eq!(
            decode(coding, b"{\"no\":\"coding at all\"}", 1 << 20),
            Err(DecodeError::Malformed),
            "{coding:?}"
        );
    }
}

#[test]
fn a_body_that_expands_too_far_is_given_up_early() {
    for (coding, name) in [(Coding::Brotli, "bomb.br"), (Coding::Zstd, "bomb.zst")] {
        let bomb = data(name);
        assert!(bomb.len() < 20_000, "{} bytes for 64 MiB", bomb.len());
        let mut decoder = Decoder::new(coding, Count::default());
        assert!(bomb.chunks(64).any(|piece| decoder.push(piece).is_err()), "{coding:?}");
        let most = FREE_BYTES + MAX_EXPANSION * bomb.len() as u64;
        assert!(decoder.sink().0 <= most, "{coding:?} {}", decoder.sink().0);
    }
}

#[test]
fn a_header_is_read_as_http_writes_it() {
    for (header, encoding) in [
        (None, Encoding::Identity),
        (Some(" identity"), Encoding::Identity),
        (Some("GZip"), Encoding::Coded(Coding::Gzip)),
        (Some("x-gzip"), Encoding::Coded(Coding::Gzip)),
        (Some("br"), Encoding::Coded(Coding::Brotli)),
        (Some("zstd "), Encoding::Coded(Coding::Zstd)),
        (Some("gzip, br"), Encoding::Unknown),
        (Some("compress"), Encoding::Unknown),
    ] {
        assert_eq!(Encoding::of(header), encoding, "{header:?}");
    }
}
