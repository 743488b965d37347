//! Usage out of an answer that passes in pieces, with bounded memory.

use std::io::Write;

use super::encoding::{Decoder, Encoding};
use super::usage::{self, Reported};
use super::{Endpoint, json};
use crate::economics::Tier;

/// Answers up to this size are kept whole until they are read; of longer ones only both ends.
pub const MAX_KEPT_BYTES: usize = 4 << 20;
/// Of a longer answer: its beginning (`id`, `model`) and its end (`usage`).
const HEAD_BYTES: usize = 4 << 10;
const TAIL_BYTES: usize = 64 << 10;

/// Watches the body of an answer that is not a stream. A file is taken for the output of a batch, a response a
/// line: their usages are summed, since a batch has one model. It keeps a copy within [`MAX_KEPT_BYTES`], of what
/// is compressed the decoded one.
#[derive(Debug)]
pub struct BodyReader {
    form: Form,
}

#[derive(Debug)]
enum Form {
    Plain(Kept),
    Coded(Decoder<Kept>),
    /// Unknown encoding, or bytes that are not what they claimed to be.
    Unreadable,
}

impl BodyReader {
    /// `content_encoding` is the answer's header.
    pub fn new(endpoint: Endpoint, content_encoding: Option<&str>) -> Self {
        let kept = Kept::new(endpoint);
        let form = match Encoding::of(content_encoding) {
            Encoding::Identity => Form::Plain(kept),
            Encoding::Coded(coding) => Form::Coded(Decoder::new(coding, kept)),
            Encoding::Unknown => Form::Unreadable,
        };
        Self { form }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let written = match &mut self.form {
            Form::Plain(kept) => kept.write_all(bytes),
            Form::Coded(decoder) => decoder.push(bytes),
            Form::Unreadable => Ok(()),
        };
        if written.is_err() {
            self.form = Form::Unreadable;
        }
    }

    /// What the answer reported, once it is complete. `None` when there is no usage in it, or it cannot be
    /// read.
    pub fn finish(self) -> Option<Reported> {
        match self.form {
            Form::Plain(mut kept) => kept.finish(),
            Form::Coded(mut decoder) => {
                decoder.finish().ok()?;
                decoder.sink().finish()
            }
            Form::Unreadable => None,
        }
    }
}

/// A body, or a line of one: whole or its two ends.
#[derive(Debug)]
struct Kept {
    endpoint: Endpoint,
    bytes: Vec<u8>,
    /// Bytes of this body or line, of which `bytes` may be the two ends.
    seen: usize,
    /// Sum of the lines that are complete.
    sum: Option<Reported>,
}

impl Kept {
    fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, bytes: Vec::new(), seen: 0, sum: None }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.seen += bytes.len();
        self.bytes.extend_from_slice(bytes);
        if self.seen > MAX_KEPT_BYTES && self.bytes.len() > HEAD_BYTES + 2 * TAIL_BYTES {
            self.bytes.drain(HEAD_BYTES..self.bytes.len() - TAIL_BYTES);
        }
    }

    fn keep_lines(&mut self, mut bytes: &[u8]) {
        while let Some(newline) = memchr::memchr(b'\n', bytes) {
            self.keep(&bytes[..newline]);
            self.end_line();
            bytes = &bytes[newline + 1..];
        }
        self.keep(bytes);
    }

    fn end_line(&mut self) {
        if let Some(line) = self.reported() {
            match &mut self.sum {
                Some(sum) => sum.usage += line.usage,
                None => self.sum = Some(line),
            }
        }
        self.bytes.clear();
        self.seen = 0;
    }

    fn finish(&mut self) -> Option<Reported> {
        if self.endpoint != Endpoint::Files {
            return self.reported();
        }
        self.end_line();
        self.sum.take()
    }

    fn reported(&self) -> Option<Reported> {
        if self.seen == self.bytes.len() {
            return usage::from_body(self.endpoint, &self.bytes);
        }
        let (head, tail) = self.bytes.split_at(HEAD_BYTES);
        let tier = text_member(head, tail, b"\"service_tier\"").and_then(|tier| Tier::named(&tier));
        let is_batch = self.endpoint == Endpoint::Files;
        Some(Reported {
            usage: usage::from_tail(self.endpoint, tail)?,
            tier: if is_batch { Tier::Batch } else { tier.unwrap_or_default() },
            model: text_member(head, tail, b"\"model\""),
            id: text_member(head, &[], b"\"id\""),
            is_background: false,
        })
    }
}

/// The value of a key in the head or, failing that, the last one in the tail.
fn text_member(head: &[u8], tail: &[u8], key: &[u8]) -> Option<String> {
    let read = |text: &[u8], at: usize| {
        let value = usage::after_colon(&text[at + key.len()..])?;
        let end = json::value_end(value)?;
        json::string(&value[..end]).map(std::borrow::Cow::into_owned)
    };
    let in_head = memchr::memmem::find_iter(head, key).find_map(|at| read(head, at));
    in_head.or_else(|| memchr::memmem::rfind_iter(tail, key).find_map(|at| read(tail, at)))
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.endpoint == Endpoint::Files {
            self.keep_lines(bytes);
        } else {
            self.keep(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;
    use crate::economics::Usage;

    const BODY: &[u8] = br#"{"id":"e","model":"m","usage":{"prompt_tokens":8,"completion_tokens":3}}"#;

    fn read(encoding: Option<&str>, bytes: &[u8], step: usize) -> Option<Reported> {
        let mut reader = BodyReader::new(Endpoint::ChatCompletions, encoding);
        bytes.chunks(step).for_each(|piece| reader.push(piece));
        reader.finish()
    }

    #[test]
    fn usage_is_found_however_the_body_is_cut_and_encoded() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(BODY).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(BODY).unwrap();
        let (gzip, zlib) = (gzip.finish().unwrap(), zlib.finish().unwrap());
        for step in 1..100 {
            for (encoding, bytes) in [(None, BODY), (Some("GZip"), &gzip[..]), (Some("deflate"), &zlib[..])] {
                assert_eq!(
                    read(encoding, bytes, step).unwrap().usage,
                    Usage::new(8, 3),
                    "{encoding:?} {step}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_decoded_reports_nothing() {
        assert_eq!(read(Some("br"), BODY, 10), None);
        assert_eq!(read(Some("gzip"), BODY, 10), None);
    }

    #[test]
    fn the_output_of_a_batch_is_the_sum_of_its_lines() {
        let line = |id: u32, padding: usize| {
            format!(
                r#"{{"id":"batch_req_{id}","response":{{"status_code":200,"body":{{"id":"c{id}","model":"gpt-4o","x":"{}","usage":{{"prompt_tokens":10,"completion_tokens":{id}}}}}}}}}"#,
                "x".repeat(padding)
            )
        };
        let failed = r#"{"id":"batch_req_9","response":{"status_code":400,"body":{"error":{}}}}"#;
        let file = [line(1, 0), failed.to_owned(), line(2, MAX_KEPT_BYTES), line(3, 10)].join("\n");
        for step in [7, 1000, 1 << 20] {
            let mut reader = BodyReader::new(Endpoint::Files, None);
            file.as_bytes().chunks(step).for_each(|piece| reader.push(piece));
            let reported = reader.finish().unwrap();
            assert_eq!((reported.usage, reported.tier), (Usage::new(30, 6), Tier::Batch));
            assert_eq!((reported.model.as_deref(), reported.id.as_deref()), (Some("gpt-4o"), Some("c1")));
        }
    }

    #[test]
    fn of_a_huge_answer_the_two_ends_are_enough() {
        let numbers = "0.125,".repeat(2_000_000);
        let body = format!(
            r#"{{"object":"list","id":"emb-1","data":[{{"embedding":[{numbers}1]}}],"model":"big","usage":{{"prompt_tokens":8,"total_tokens":8}}}}"#
        );
        let mut reader = BodyReader::new(Endpoint::Embeddings, None);
        for piece in body.as_bytes().chunks(16 << 10) {
            reader.push(piece);
            let Form::Plain(kept) = &reader.form else { panic!("not encoded") };
            assert!(kept.bytes.len() <= MAX_KEPT_BYTES + (16 << 10));
        }
        let reported = reader.finish().unwrap();
        assert_eq!(
            (reported.usage, reported.model.as_deref(), reported.id.as_deref()),
            (Usage::new(8, 0), Some("big"), Some("emb-1"))
        );
    }
}
