//! The live page: four embedded files and the headers they are served with.
//!
//! The files hold no figures and no secrets, so they need no token; what they fetch (`/api/events`, `/api/pin`,
//! `/api/unpin`) does. The content security policy lets the page load and call nothing but its own origin,
//! and run no inline script or style.

use bytes::Bytes;
use http::Response;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};

const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    // A new version of the proxy shows its own page at once.
    (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
];

/// One file of the page.
#[derive(Debug)]
pub struct Resource {
    content_type: &'static str,
    body: &'static str,
}

const PAGE: Resource = Resource { content_type: "text/html; charset=utf-8", body: include_str!("page.html") };
const SCRIPT: Resource =
    Resource { content_type: "text/javascript; charset=utf-8", body: include_str!("page.js") };
const STYLE: Resource = Resource { content_type: "text/css; charset=utf-8", body: include_str!("page.css") };
const ICON: Resource = Resource { content_type: "image/svg+xml", body: include_str!("page.svg") };

/// The file at a path of the admin side, if it is the page's.
pub fn find(path: &str) -> Option<&'static Resource> {
    match path {
        "/" => Some(&PAGE),
        "/page.js" => Some(&SCRIPT),
        "/page.css" => Some(&STYLE),
        "/page.svg" | "/favicon.ico" => Some(&ICON),
        _ => None,
    }
}

impl Resource {
    /// The answer to a GET; for a HEAD, its body is dropped.
    pub fn response(&self) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from_static(self.body.as_bytes()));
        let headers = response.headers_mut();
        headers.extend(HEADERS.map(|(name, value)| (Some(name), value)));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of an attribute in the page's markup.
    fn attributes<'a>(name: &str, html: &'a str) -> Vec<&'a str> {
        html.split(&format!(" {name}=\"")).skip(1).filter_map(|rest| rest.split('"').next()).collect()
    }

    #[test]
    fn whatever_the_page_loads_is_embedded() {
        for name in ["src", "href"] {
            for target in attributes(name, PAGE.body).into_iter().filter(|target| !target.starts_with(['#']))
            {
                let ours = find(&format!("/{target}")).is_some() || target.starts_with("api/");
                assert!(ours, "`{target}` is not served");
            }
        }
    }

    #[test]
    fn the_page_keeps_to_its_policy() {
        assert!(!PAGE.body.contains("<style") && attributes("style", PAGE.body).is_empty());
        assert!(attributes("onclick", PAGE.body).is_empty());
        let scripts = PAGE.body.matches("<script").count();
        assert_eq!(scripts, PAGE.body.matches("<script type=\"module\" src=").count());
        assert!(!SCRIPT.body.contains("innerHTML") && !SCRIPT.body.contains("eval("));
        for file in [PAGE.body, SCRIPT.body, STYLE.body] {
            assert!(!file.replace("http://www.w3.org/2000/svg", "").contains("://"), "another host is named");
        }
    }

    #[test]
    fn every_element_that_the_script_asks_for_is_in_the_page() {
        for rest in SCRIPT.body.split(" at(\"").skip(1) {
            let id = rest.split('"').next().unwrap();
            assert!(PAGE.body.contains(&format!("id=\"{id}\"")), "`{id}`");
        }
    }

    #[test]
    fn a_resource_is_served_with_the_policy_and_its_type() {
        let response = find("/").unwrap().response();
        assert_eq!(response.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
        assert!(response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap().contains("script-src 'self';"));
        assert!(find("/page.rs").is_none());
    }
}
