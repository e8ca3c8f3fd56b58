{{/* diptych.yaml: what the values say, and what only the chart can know about the pods it runs in. */}}
{{- define "diptych.config" -}}
{{- $config := deepCopy .Values.diptych -}}
{{- $router := mustMergeOverwrite (dict) (get $config "router" | default (dict)) (dict "host" "127.0.0.1" "port" 8001) -}}
{{- $own := dict "router" $router "run_dir" "/tmp/diptych" "cache_dir" "/cache/diptych" "data_dir" "/data/diptych" -}}
{{- if .Values.data.passwordSecret -}}
{{- $store := get $config "store" | default (dict) -}}
{{- $_ := set $own "store" (mustMergeOverwrite (dict) $store (dict "password_file" "/etc/diptych-store/password")) -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $config $own) -}}
{{- end -}}

{{/* A quantity such as 6Gi or 512Mi in MiB; the schema lets no other units in. */}}
{{- define "diptych.mebibytes" -}}
{{- if hasSuffix "Gi" . -}}{{- mul 1024 (trimSuffix "Gi" . | int) -}}{{- else -}}{{- trimSuffix "Mi" . | int -}}{{- end -}}
{{- end -}}

{{/* What no schema can say: values that do not go together. */}}
{{- define "diptych.check" -}}
{{- $needed := 300 -}}
{{- $gpus := .Values.worker.gpus | int -}}
{{- range $name, $model := .Values.diptych.models | default (dict "built-in" dict) -}}
  {{- $model = $model | default dict -}}
  {{- $kv := $model.kv | default dict -}}
  {{- $prefill := $model.prefill | default dict -}}
  {{- $decode := $model.decode | default dict -}}
  {{- if and (eq ($model.layout | default "disaggregated") "colocated") (hasKey $model "prefill") -}}
    {{- fail (printf "diptych.models.%s: the layout colocated has no prefill pool; remove prefill, or write layout: disaggregated" $name) -}}
  {{- end -}}
  {{- $device := $model.device | default "auto" -}}
  {{- if and (eq $device "cuda") (not $gpus) -}}
    {{- fail (printf "diptych.models.%s.device is cuda, and the pod has no card: set worker.gpus" $name) -}}
  {{- end -}}
  {{- $onCard := and (gt $gpus 0) (ne $device "cpu") (ne ($model.source | default "") "echo") -}}
  {{- range $role, $pool := dict "prefill" $prefill "decode" $decode -}}
    {{- if not (and (eq $role "prefill") (eq ($model.layout | default "disaggregated") "colocated")) -}}
      {{- $arena := (($pool.kv | default dict).memory_mib | default $kv.memory_mib) | default 512 | int -}}
      {{- $each := ternary 3072 (add 540 $arena) $onCard -}}
      {{- $needed = add $needed (mul (($pool.engines | default 1) | int) $each) -}}
    {{- end -}}
  {{- end -}}
  {{- if and (hasPrefix "/" ($model.source | default "")) (not $.Values.models.claimName) -}}
    {{- fail (printf "diptych.models.%s.source is the folder %s, and no volume is mounted: set models.claimName" $name $model.source) -}}
  {{- end -}}
{{- end -}}
{{- $room := include "diptych.mebibytes" .Values.worker.memory | int -}}
{{- if gt ($needed | int) $room -}}
{{- fail (printf "worker.memory is %s (%d MiB), and the engines need %d MiB before any weights: raise it, or lower engines or kv.memory_mib in diptych.models" .Values.worker.memory $room ($needed | int)) -}}
{{- end -}}
{{- if ge (include "diptych.mebibytes" .Values.worker.sharedMemory | int) $room -}}
{{- fail (printf "worker.sharedMemory %s is part of worker.memory %s and must be less" .Values.worker.sharedMemory .Values.worker.memory) -}}
{{- end -}}
{{- if and .Values.data.passwordSecret (not ((.Values.diptych.store | default dict).url)) -}}
{{- fail "data.passwordSecret is given, and no database asks for it: set diptych.store.url" -}}
{{- end -}}
{{- if and .Values.providers.keysSecret (not .Values.diptych.providers) -}}
{{- fail "providers.keysSecret is given, and no provider asks for it: name one in diptych.providers" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations are given for an account that the chart does not create: set serviceAccount.create" -}}
{{- end -}}
{{- end -}}
