//! The Rust of the protocol is kept in the repository, so that nobody needs a protobuf compiler to build
//! it. This test makes it anew from `proto/` and compares: run with `UPDATE_GOLDEN=1` after a change there.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use prost_build::{Service, ServiceGenerator};

/// What prost does not make: the requests as one type, and which response belongs to which.
struct Calls;

impl ServiceGenerator for Calls {
    fn generate(&mut self, service: Service, to: &mut String) {
        let full_name = format!("{}.{}", service.package, service.proto_name);
        let methods = || service.methods.iter();
        let put = |to: &mut String, line: std::fmt::Arguments<'_>| writeln!(to, "{line}").unwrap();
        put(to, format_args!("/// The service's name on the wire."));
        put(to, format_args!("pub const SERVICE: &str = {full_name:?};"));
        put(to, format_args!("/// A request, whichever it is."));
        put(to, format_args!("#[derive(Clone, Debug, PartialEq)]"));
        put(to, format_args!("pub enum Call {{"));
        for m in methods() {
            put(
                to,
                format_args!("{}(super::{}),", m.proto_name, m.input_type),
            );
        }
        put(to, format_args!("}}"));
        put(to, format_args!("impl Call {{"));
        put(to, format_args!("/// Names of all requests."));
        put(
            to,
            format_args!("pub const NAMES: &'static [&'static str] = &["),
        );
        for m in methods() {
            put(to, format_args!("{:?},", m.proto_name));
        }
        put(to, format_args!("];"));
        put(
            to,
            format_args!(
                "/// Reads the request of that name; nothing if there is none.\n\
                 pub fn decode(name: &str, payload: &[u8]) -> Option<Result<Self, ::prost::DecodeError>> {{\n\
                 use ::prost::Message;\n\
                 Some(match name {{"
            ),
        );
        for m in methods() {
            let (name, input) = (&m.proto_name, &m.input_type);
            put(
                to,
                format_args!("{name:?} => super::{input}::decode(payload).map(Self::{name}),"),
            );
        }
        put(to, format_args!("_ => return None,\n}})\n}}"));
        put(
            to,
            format_args!("/// Its name.\npub fn name(&self) -> &'static str {{\nmatch self {{"),
        );
        for m in methods() {
            put(
                to,
                format_args!("Self::{}(_) => {:?},", m.proto_name, m.proto_name),
            );
        }
        put(to, format_args!("}}\n}}\n}}"));
        for m in methods() {
            put(
                to,
                format_args!(
                    "impl crate::Rpc for super::{} {{\nconst METHOD: &'static str = {:?};\ntype Response = super::{};\n}}",
                    m.input_type, m.proto_name, m.output_type
                ),
            );
        }
    }
}

#[test]
fn the_generated_code_is_that_of_the_protocol() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = here.join("proto");
    let files = protox::compile(["agent.proto", "ttrpc.proto"], [&proto]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new()
        .out_dir(out.path())
        .btree_map(["."])
        .service_generator(Box::new(CallsModule))
        .compile_fds(files)
        .unwrap();
    for (made, kept) in [
        ("testudo.agent.v1.rs", "messages.rs"),
        ("ttrpc.rs", "envelope.rs"),
    ] {
        let text = fs::read_to_string(out.path().join(made)).unwrap();
        let path = here.join("src/generated").join(kept);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == text, "{} is not what proto/ says", path.display());
    }
}

/// Puts it into a module of its own.
struct CallsModule;

impl ServiceGenerator for CallsModule {
    fn generate(&mut self, service: Service, to: &mut String) {
        to.push_str("/// Requests by name.\npub mod calls {\n");
        Calls.generate(service, to);
        to.push_str("}\n");
    }
}
