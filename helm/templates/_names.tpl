{{/* The name of the RayService: at most 40 characters, because the operator adds to it, and a letter first. */}}
{{- define "diptych.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "diptych" $name) -}}{{- $name = printf "%s-diptych" $name -}}{{- end -}}
{{- if gt (len $name) 40 -}}
{{- fail (printf "the release name %q is too long: with the chart's own name it has %d characters, and KubeRay leaves room for 40" .Release.Name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the release name %q cannot name a Service: begin with a letter, and use lower-case letters, digits and '-' only" .Release.Name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Labels of objects that Ray's pods are no part of: these may change with the chart's version. */}}
{{- define "diptych.labels" -}}
{{ include "diptych.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels in pod templates. Nothing with a version: a changed label is a new Ray cluster. */}}
{{- define "diptych.podLabels" -}}
app.kubernetes.io/name: diptych
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "diptych.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "diptych.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "diptych.image" -}}
{{- $image := .Values.image -}}
{{- $repository := required "image.repository is empty: there is no published image, so build your own (see the chart's README.md) and name it here" $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
