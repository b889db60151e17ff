//! `testudo pull`, `images`, `rmi`.

use std::process::ExitCode;

use serde_json::json;
use testudo_image::{Pruning, PullPolicy};

use super::{Context, each, print, say};
use crate::args::{Format, ImagesArgs, PullArgs, RmiArgs};
use crate::commands::list::{mebibytes, table};
use crate::image::{pull as fetch, store};

pub(super) fn pull(context: &Context, args: &PullArgs) -> anyhow::Result<ExitCode> {
    Ok(each(&args.images, |name| {
        let image = fetch(name, &context.config, PullPolicy::Always)?;
        let digest = image.digest.map_or_else(
            || image.rootfs.path().display().to_string(),
            |d| d.to_string(),
        );
        Ok(say(&digest)?)
    }))
}

pub(super) fn images(context: &Context, args: &ImagesArgs) -> anyhow::Result<ExitCode> {
    let all = store(&context.config)?.list()?;
    if args.format == Format::Json {
        let rows: Vec<_> = all
            .iter()
            .map(|image| {
                json!({"names": image.names, "digest": image.digest.as_ref().map(ToString::to_string),
                    "size": image.size, "path": image.rootfs.path(), "config": image.config})
            })
            .collect();
        say(&serde_json::to_string_pretty(&rows)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let heads = ["NAME", "DIGEST", "SIZE"].map(str::to_owned);
    let rows: Vec<[String; 3]> = all
        .iter()
        .map(|image| {
            let name = if image.names.is_empty() {
                "-".to_owned()
            } else {
                image.names.join(", ")
            };
            let digest = image
                .digest
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
            let short: String = digest
                .split(':')
                .next_back()
                .unwrap_or_default()
                .chars()
                .take(12)
                .collect();
            [name, short, mebibytes(image.size)]
        })
        .collect();
    print(table(&heads, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn rmi(context: &Context, args: &RmiArgs) -> anyhow::Result<ExitCode> {
    let store = store(&context.config)?;
    if args.unused {
        let freed = store.prune(
            Pruning {
                layers: true,
                ..Pruning::default()
            },
            &[],
        )?;
        say(&format!(
            "{} images, {}",
            freed.images.len(),
            mebibytes(freed.bytes)
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    Ok(each(&args.images, |name| {
        let freed = store.remove(name)?;
        Ok(say(&format!("{name}: {}", mebibytes(freed.bytes)))?)
    }))
}
