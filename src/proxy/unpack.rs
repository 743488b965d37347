//! Compressed request bodies of the calls that are read.
//!
//! A call must be read to be routed, and neither vLLM (400) nor llama.cpp (415) takes a compressed body, so it is
//! decoded here, up to the limit of a body, and sent on as it is then. Paths that are passed on as they come keep
//! their encoding.

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};

use super::error::ProxyError;
use crate::openai::ApiError;
use crate::openai::encoding::{Coding, DecodeError, Encoding, decode};

/// The body without its encoding, which is taken out of the head.
pub async fn unpack(headers: &mut HeaderMap, body: Bytes, limit: usize) -> Result<Bytes, ProxyError> {
    let Some(coding) = coding_of(headers)? else { return Ok(body) };
    headers.remove(header::CONTENT_ENCODING);
    // Tens of megabytes take tens of milliseconds.
    let decoded = tokio::task::spawn_blocking(move || decode(coding, &body, limit)).await;
    match decoded.map_err(|_| ProxyError::Internal)? {
        Ok(body) => Ok(body.into()),
        Err(DecodeError::TooLong) => Err(ProxyError::BodyTooLarge { limit }),
        Err(DecodeError::Malformed) => {
            let why =
                "the body is not encoded as its `content-encoding` says, or expands more than 256 times";
            Err(ProxyError::Request(ApiError::invalid_request(why)))
        }
    }
}

fn coding_of(headers: &HeaderMap) -> Result<Option<Coding>, ProxyError> {
    let mut values = headers.get_all(header::CONTENT_ENCODING).iter();
    let (first, is_one) = (values.next(), values.next().is_none());
    match Encoding::of(first.and_then(|value| value.to_str().ok())) {
        Encoding::Identity if is_one => Ok(None),
        Encoding::Coded(coding) if is_one => Ok(Some(coding)),
        _ => {
            let why = "this `content-encoding` of a request is not supported; send one of gzip, deflate, br and zstd, \
                       or none";
            let kind = "invalid_request_error";
            Err(ProxyError::Request(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, kind, why)))
        }
    }
}
